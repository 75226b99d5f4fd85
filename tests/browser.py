"""Chromium without a window, for tests of what a person sees: Debian's packages `chromium` and `chromium-driver`."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

WIDTH, HEIGHT = 1360, 1000
PAGE_SECONDS = 60.0
LOOK_SECONDS = 0.2
_PROGRAMS = ("chromium", "chromedriver")
_OPTIONS = (
    "--headless=new",
    # Root may not use the sandbox; the only pages are those of our own server.
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--lang=en-US",
)

needed = pytest.mark.skipif(
    not all(map(shutil.which, _PROGRAMS)), reason="needs chromium and chromedriver on the PATH"
)


class Browser:
    """One window. What it shows is waited for, never slept for."""

    def __init__(self, driver: webdriver.Chrome, address: str) -> None:
        self.driver = driver
        self._address = address

    def open(self, path: str, *words: str) -> None:
        """Open a page of the server and wait until it shows some words."""
        self.driver.get(f"{self._address}{path}")
        self.wait_for(*words)

    def wait_for(self, *words: str) -> None:
        """Wait until the page shows some words."""
        self.wait(f"the page shows {words}", lambda: all(word in self.text for word in words))

    def wait(self, what: str, look: Callable[[], object]) -> None:
        """Wait until something holds; fail with what the page shows instead."""
        deadline = time.monotonic() + PAGE_SECONDS
        while not look():
            assert time.monotonic() < deadline, f"not within time: {what}; it shows:\n{self.text}"
            time.sleep(LOOK_SECONDS)

    @property
    def text(self) -> str:
        """All that the page shows."""
        try:
            return self.driver.find_element(By.TAG_NAME, "body").text
        except StaleElementReferenceException:
            return ""

    def click(self, xpath: str) -> None:
        """Click on the first element of an XPath, once it is there."""
        self.wait(xpath, lambda: self.driver.find_elements(By.XPATH, xpath))
        self.driver.find_elements(By.XPATH, xpath)[0].click()

    def scroll_to(self, xpath: str) -> None:
        """Bring the first element of an XPath to the top."""
        element = self.driver.find_elements(By.XPATH, xpath)[0]
        self.driver.execute_script("arguments[0].scrollIntoView()", element)

    def count(self, css: str) -> int:
        """How many elements a selector finds."""
        return len(self.driver.find_elements(By.CSS_SELECTOR, css))

    def screenshot(self, path: Path) -> None:
        """Write what the window shows as a PNG."""
        self.driver.save_screenshot(str(path))


@contextmanager
def opened(address: str, profile: Path) -> Iterator[Browser]:
    """Start Chromium with an empty profile for a `with` block. Nothing is downloaded: both programs are named."""
    options = Options()
    options.binary_location = str(shutil.which("chromium"))
    for option in (*_OPTIONS, f"--window-size={WIDTH},{HEIGHT}", f"--user-data-dir={profile}"):
        options.add_argument(option)
    driver = webdriver.Chrome(options, Service(str(shutil.which("chromedriver"))))
    try:
        yield Browser(driver, address)
    finally:
        driver.quit()
