"""What is measured, not asserted: each script prints ratios of one run, side by side, and keeps them in results/.

python -m tests.benchmarks.engine_speed         INT8 against FP32, ONNX Runtime
python -m tests.benchmarks.export_memory        peak memory of exports
python -m tests.benchmarks.memory_budget        peak memory of a 530B model's layer with --memory 2GB
python -m tests.benchmarks.trtllm_ranks         memory and time of a TensorRT-LLM export, by ranks
python -m tests.benchmarks.onnx_forms           how accurate each form of an ONNX export is
python -m tests.benchmarks.tensorrt_rtx         what TensorRT's compiler makes of our graphs
python -m tests.benchmarks.calibration_speed    calibrate + export against llm-compressor
python -m tests.benchmarks.tables               writes the README's tables from results/
"""
