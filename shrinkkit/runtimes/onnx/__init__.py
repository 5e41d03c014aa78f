"""ONNX files, shared by ONNX Runtime and OpenVINO."""
