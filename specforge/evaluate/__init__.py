"""What a draft is worth: teacher-forced acceptance, and real speculative decoding."""
