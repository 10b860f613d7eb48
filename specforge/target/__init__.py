"""The target model: its weights as files, and the engines that run it."""
