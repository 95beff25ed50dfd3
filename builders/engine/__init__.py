"""What all engines share: their protocol, generation, speed, exports. `table` says which class opens which folder.

The classes import what they share from here, and the table names the classes: so this package imports no module of its
own.
"""
