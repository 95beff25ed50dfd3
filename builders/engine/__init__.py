"""The shared parts of all engines: protocol, generation, speed, exports, and the table of the classes of engines.

The classes import the shared parts from here, and the table names the classes. So this file imports no module of the
package.
"""
