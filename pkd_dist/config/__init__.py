"""The configuration of a run: schema, loading, the DeepSpeed JSON, and the generated reference."""
