"""What an engine is, which class opens which folder, and what all engines share: generation, speed, exports."""

from builders.engine.engine import ENGINES, FOREIGN, SHAPE, Engine, engine_manifest, open_engine

__all__ = ["ENGINES", "FOREIGN", "SHAPE", "Engine", "engine_manifest", "open_engine"]
