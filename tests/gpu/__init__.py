"""What only a device can prove: ``python -m tests.gpu FOLDER`` runs all of it, pytest the parts that need no device."""
