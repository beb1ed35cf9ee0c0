"""FedSpine Edge: federated fine-tuning that shrinks the model, on the device."""
