// Asks the server; the token stays in this page's memory, and is gone with it.

let token = "";

export class Refused extends Error {
  constructor(status, message, retryAfterS) {
    super(message);
    this.status = status;
    this.retryAfterS = retryAfterS;
  }
}

export function useToken(text) {
  const given = text.trim();
  if (!/^[\x20-\x7e]*$/.test(given)) {
    throw new Refused(0, "This is no token: it holds a character that no token has (tokens are plain ASCII). Copy it again.");
  }
  token = given;
}

export function hasToken() {
  return token !== "";
}

export async function ask(method, path, { json, body, type, signal } = {}) {
  const headers = {};
  if (token) headers.Authorization = `Bearer ${token}`;
  if (json !== undefined) {
    body = JSON.stringify(json);
    type = "application/json";
  }
  if (type) headers["Content-Type"] = type;
  let response;
  try {
    response = await fetch(path, { method, headers, body, signal, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server does not answer. Is it running?");
  }
  if (response.status === 204) return null;
  const reply = await response.json().catch(() => null);
  if (!response.ok || reply === null) {
    const said = reply?.detail ?? `The server answered with status ${response.status}.`;
    throw new Refused(response.status, said, reply?.retry_after_s);
  }
  return reply;
}

const ARRAYS = { float32: Float32Array, uint16: Uint16Array, int16: Int16Array };

// Reads an array that came as base64 of its little-endian bytes.
export function array(tensor) {
  if (!tensor) return null;
  const text = atob(tensor.base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return new ARRAYS[tensor.dtype](bytes.buffer);
}
