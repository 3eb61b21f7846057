"""How the bundled demo model is made; glm4/demo/README.md says in which order."""
