// Opens a page in Chromium and tells what it saw: arguments are the page's URL, a picture to make, width, color scheme.
import chromium from "@sparticuz/chromium";
import puppeteer from "puppeteer-core";

const [url, picture, width, scheme] = process.argv.slice(2);
const seen = { requests: [], messages: [] };
const browser = await puppeteer.launch({
  args: chromium.args,
  executablePath: await chromium.executablePath(),
  headless: "shell",
});
const page = await browser.newPage();
page.on("request", (request) => seen.requests.push(request.url()));
page.on("console", (message) => seen.messages.push(message.text()));
page.on("pageerror", (error) => seen.messages.push(error.message));
await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
await page.setViewport({ width: Number(width), height: 900 });
await page.goto(url, { waitUntil: "load" });
seen.width = await page.evaluate(() => document.documentElement.scrollWidth);
// Of the figures: how far text sticks out on either side of the window.
seen.outside = await page.evaluate(() =>
  Math.max(...[...document.querySelectorAll("svg text")].map((text) => {
    const box = text.getBoundingClientRect();
    return Math.max(-box.left, box.right - window.innerWidth);
  })),
);
// Labels beside lines that touch one another.
seen.overlaps = await page.evaluate(() => {
  const boxes = [...document.querySelectorAll("svg text")].map((t) => [t.textContent, t.getBoundingClientRect()]);
  const touch = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3;
  return boxes.flatMap(([name, a], i) => boxes.slice(i + 1).filter(([, b]) => touch(a, b)).map(([n]) => `${name} / ${n}`));
});
await page.screenshot({ path: picture, fullPage: true });
await browser.close();
console.log(JSON.stringify(seen));
