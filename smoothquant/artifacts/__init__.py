"""What rooms promise each other on disk: exporters and builders write it, builders and validation read it.

record            JSON into frozen records, strictly, and back
manifest          what made a folder, out of what, and what it found
smoothing_file    smoothing scales and ranges of every linear
ports             names of a decoder's inputs and outputs
safetensors_files, shards   weights, written in place
"""
