"""What the end-to-end tests stand on: a real server, the official clients, HTTP from outside."""
