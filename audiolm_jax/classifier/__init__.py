"""The paper's convolutional classifier of one-second clips: of speakers, and of real and generated speech."""
