"""What every room uses: errors, settings, text files, devices. Imports no other room."""
