"""Turns a float32 ONNX or TFLite file into an int8 one with ranges from calibration images, or a float16 one."""
