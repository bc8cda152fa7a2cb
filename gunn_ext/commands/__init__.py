"""What the commands of ``gunn`` do; `gunn_ext.cli` chooses one and turns errors into messages."""
