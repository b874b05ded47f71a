"""Adapter folders in the file format of Hugging Face PEFT, or of a method's own library."""
