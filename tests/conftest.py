"""The order of the tests: files that take long begin first, so that no process ends with them alone."""


def pytest_collection_modifyitems(items):
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
