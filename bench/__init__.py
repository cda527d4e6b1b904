"What a training step costs, measured side by side. See README.md."
