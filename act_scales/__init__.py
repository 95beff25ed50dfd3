"""What activations do: calibration text, per-channel maxima collected layer by layer, and the file that keeps them.

`text` cuts text into token sequences, `collect` runs a model over them, `store` reads and writes what came out;
`catalogue` fetches what the authors of SmoothQuant published.
"""
