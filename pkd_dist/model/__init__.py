"""Layer maps, the encoder that is trained or cached, and the creation of a student."""
