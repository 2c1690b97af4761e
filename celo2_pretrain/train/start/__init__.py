"""What happens before the first step: checks, ranks, hosts."""
