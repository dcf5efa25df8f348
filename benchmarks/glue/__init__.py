"""Methods, depths and seeds on real tasks; see README.md."""
