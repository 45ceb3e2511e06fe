// Colours that people with any kind of colour vision can tell apart, for light and dark.

const WORDS = {
  light: ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#882255", "#999933", "#332288", "#44AA99"],
  dark: ["#4DA3E0", "#F0B03C", "#2BC49A", "#F07A3C", "#E39BC4", "#A5DAF7", "#D0669B", "#C8C862", "#A79AF0", "#79DCCD"],
};
const OTHER = { light: "#A3A9B2", dark: "#646C77" };
// From little to much: lightness alone tells them apart.
const RAMP = {
  light: ["#DFE3E8", "#9CC3DF", "#4A90C2", "#1A5A96", "#0B2A5B"],
  dark: ["#3A424D", "#2F6C9E", "#4FA3D8", "#A6D8EE", "#FBF3C4"],
};
export const COLOURED = WORDS.light.length;

const dark = window.matchMedia("(prefers-color-scheme: dark)");

export function theme() {
  return dark.matches ? "dark" : "light";
}

export function onTheme(call) {
  dark.addEventListener("change", call);
}

export function rgb(hex) {
  const n = parseInt(hex.slice(1), 16);
  return [n >> 16, (n >> 8) & 255, n & 255];
}

export function word(place) {
  return place < COLOURED && place >= 0 ? WORDS[theme()][place] : OTHER[theme()];
}

export function ramp(share) {
  const stops = RAMP[theme()];
  const at = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const low = Math.min(Math.floor(at), stops.length - 2);
  const a = rgb(stops[low]);
  const b = rgb(stops[low + 1]);
  return a.map((value, i) => Math.round(value + (b[i] - value) * (at - low)));
}
