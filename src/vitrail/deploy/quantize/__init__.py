"""8-bit integers: dynamic (ONNX Runtime) and static (OpenVINO), and which layers to leave in float32."""
