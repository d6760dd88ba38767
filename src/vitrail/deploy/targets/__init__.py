"""Files of the targets that are made from the ONNX files or beside them."""
