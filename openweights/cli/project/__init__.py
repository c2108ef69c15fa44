"""Commands about a project and who may use it."""
