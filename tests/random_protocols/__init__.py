"""What random_protocols_child.py is made of.

    ends       what both ends of a connection have, and what is checked of each byte between them
    peers      plain sockets at the other end, and what they do
    programs   the protocols under test, and what must hold in each of their callbacks
    acts       what a program does there
    moves      what happens in a round
    rounds     a round, from its loop to the check that nothing is left

The order in which acts and moves are defined is part of what a seed means.
"""
