"""Capturing what frameworks' own logging calls say, in the training process: TensorBoard, Lightning, Hugging Face."""
