// Pictures of pages in Chromium (light, dark, phone, print) into FOLDER, and what axe-core finds in each.
// Command: npm install --no-save axe-core puppeteer-core, then node tools/look.mjs FOLDER PAGE.html...
import { mkdirSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, dirname, join, resolve } from "node:path";
import { pathToFileURL } from "node:url";
import puppeteer from "puppeteer-core";

const KINDS = { light: 1280, dark: 1280, phone: 390, print: 690 };
const [folder, ...files] = process.argv.slice(2);
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const browser = await puppeteer.launch({ executablePath: "/usr/bin/chromium", args: ["--no-sandbox"] });
let serious = 0;
mkdirSync(folder, { recursive: true });
for (const file of files.map((name) => resolve(name))) {
  const name = `${basename(dirname(file))}-${basename(file, ".html")}`;
  for (const [kind, width] of Object.entries(KINDS)) {
    const context = await browser.createBrowserContext(); // the site remembers the colours of its last visit
    const page = await context.newPage();
    await page.setViewport({ width, height: 900 });
    await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: kind === "dark" ? "dark" : "light" }]);
    if (kind === "print") await page.emulateMediaType("print");
    await page.goto(pathToFileURL(file).href, { waitUntil: "load" });
    await page.screenshot({ path: join(folder, `${name}-${kind}.png`), fullPage: true });
    const content = await page.evaluate(() => document.documentElement.scrollWidth);
    if (content > width) console.log(`${name} ${kind}: ${content - width} pixels wider than the window`);
    await page.evaluate(() => document.querySelectorAll("details").forEach((part) => (part.open = true)));
    await page.evaluate(axe);
    const { violations } = await page.evaluate(() => axe.run());
    for (const { impact, id, help, nodes } of violations) {
      serious += impact === "serious" || impact === "critical";
      console.log(`${name} ${kind}: ${impact}: ${id}: ${help}: ${nodes.map((node) => node.target.join(" ")).join(", ")}`);
    }
    await context.close();
  }
}
await browser.close();
console.log(`${files.length} pages, ${serious} serious faults; pictures are in ${folder}`);
process.exit(serious ? 1 : 0);
