"""The reward client as a plug-in for other trainers: TRL, OpenRLHF and verl, and exports of rollouts.

Each module speaks its trainer's own protocol and ours to the service; none imports another, and importing
one needs no library but the trainer that it is for. What they share is in `groups`.
"""
