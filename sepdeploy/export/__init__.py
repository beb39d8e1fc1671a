"""Writes a PyTorch network as an ONNX or a TFLite file in float32."""
