"""What each command of the program does; the only place where the device's and the server's packages meet."""
