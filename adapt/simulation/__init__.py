"""The pure machines in virtual time: the same scheduler, sessions, holdings and outcomes, among simulated processes and a bad network.

One seed draws everything: who there is, what is asked, how long each message takes, which faults come. So a run can be had again, event
by event. After FoundationDB's simulator (Zhou et al. 2021, "FoundationDB: A Distributed Unbundled Transactional Key Value Store",
section 4) and TigerBeetle's VOPR.

    timeline.py    virtual time, and processes with clocks of their own
    network.py     connections that delay, hold back, tear and forget         link.py       a peer's two connections in one session
    dispatcher.py  worker.py  client.py  leases.py                            the processes: what the runtime does around the machines
    arithmetic.py  what the simulated models compute                          faults.py     which faults a seed draws, and when they come
    inspector.py   invariants after each step, and rare paths counted         history.py    what the clients saw, held against the truth
    simulation.py  all of it together                                         story.py      what happened to one request
"""
