"""Methods, depths and seeds on real tasks."""
