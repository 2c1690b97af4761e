"""What ends a run, and how a run goes on afterwards."""
