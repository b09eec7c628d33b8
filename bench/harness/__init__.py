"""What all benches share: contestants take turns, every answer is checked, figures become tables, files and plots."""
