"""What `adapt demo` shows: a model split over processes that die, and all answers right."""
