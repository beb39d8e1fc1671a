"""What each stage of a conversion does; their order is in `sepdeploy.pipeline`."""
