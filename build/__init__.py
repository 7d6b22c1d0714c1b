"""The build floor: a Hugging Face checkpoint becomes an engine directory."""
