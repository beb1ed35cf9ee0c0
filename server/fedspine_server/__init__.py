"""The server of FedSpine Edge: controllers, aggregation, the coordinator of rounds and the fleet simulator."""
