/** Signs tokens with the tenant's own RSA key (RS256), by WebCrypto: the key never leaves the process. */

import { BehestConfigError } from "./errors.js";

/** What a token says; the order of its claims is that of the published clients. */
export interface Claims {
  tenantId: string;
  projectId: string;
  userId: string;
  sessionId: string;
  tier: number | string | undefined;
  issuer: string;
  audience: string;
  ttl: number;
}

/** A private key of `BEHEST_KEY`: PEM, base64 of PEM, or `behest_pk_` and one of them. */
export class TokenSigner {
  readonly #pem: string;
  readonly #kid: string;
  #key: Promise<CryptoKey> | undefined;

  constructor(key: string, kid: string) {
    this.#pem = pemOf(key);
    this.#kid = kid;
  }

  /** The signed token. Throws `BehestConfigError` where the key is no RSA key. */
  async sign(claims: Claims, nowMs: number): Promise<string> {
    this.#key ??= importKey(this.#pem);
    const issued = Math.floor(nowMs / 1000);
    const payload = {
      tid: claims.tenantId,
      pid: claims.projectId,
      uid: claims.userId,
      role: "user",
      scp: [],
      iss: claims.issuer,
      aud: claims.audience,
      iat: issued,
      nbf: issued,
      exp: issued + claims.ttl,
      jti: crypto.randomUUID(),
      sid: claims.sessionId,
      ...(claims.tier === undefined ? {} : { tier: claims.tier }),
    };
    const header = { alg: "RS256", typ: "JWT", kid: this.#kid };
    const signed = `${base64url(JSON.stringify(header))}.${base64url(JSON.stringify(payload))}`;
    const bytes = new TextEncoder().encode(signed);
    const signature = await crypto.subtle.sign("RSASSA-PKCS1-v1_5", await this.#key, bytes);
    return `${signed}.${base64url(new Uint8Array(signature))}`;
  }
}

function pemOf(key: string): string {
  const text = (key.startsWith("behest_pk_") ? key.slice("behest_pk_".length) : key).trim();
  // In environment variables line feeds are often written as two characters.
  if (text.includes("-----BEGIN")) return text.replaceAll("\\n", "\n");
  try {
    const decoded = atob(text.replace(/\s+/g, ""));
    if (decoded.includes("-----BEGIN")) return decoded;
  } catch {
    // told below
  }
  throw new BehestConfigError(
    "BEHEST_KEY is neither an API key (behest_sk_...) nor a token nor a private key in PEM, or base64 of PEM.",
  );
}

async function importKey(pem: string): Promise<CryptoKey> {
  const match = /-----BEGIN (RSA )?PRIVATE KEY-----([A-Za-z0-9+/=\s]+)-----END/.exec(pem);
  const problem = "BEHEST_KEY is no RSA private key without a passphrase (PKCS #8 or PKCS #1, in PEM).";
  if (!match?.[2]) throw new BehestConfigError(problem);
  try {
    const der = Uint8Array.from(atob(match[2].replace(/\s+/g, "")), (unit) => unit.charCodeAt(0));
    const algorithm = { name: "RSASSA-PKCS1-v1_5", hash: "SHA-256" };
    return await crypto.subtle.importKey("pkcs8", match[1] ? wrapped(der) : der, algorithm, false, ["sign"]);
  } catch (cause) {
    throw new BehestConfigError(problem, { cause });
  }
}

/** WebCrypto takes PKCS #8 only: an RSAPrivateKey (RFC 8017) gets its envelope (RFC 5958). */
function wrapped(rsa: Uint8Array): Uint8Array<ArrayBuffer> {
  const version = [0x02, 0x01, 0x00];
  const rsaEncryption = [0x30, 0x0d, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01, 0x05, 0x00];
  return tagged(0x30, [...version, ...rsaEncryption, ...tagged(0x04, rsa)]);
}

function tagged(tag: number, content: ArrayLike<number>): Uint8Array<ArrayBuffer> {
  const { length } = content;
  const sizes = length < 128 ? [length] : length < 256 ? [0x81, length] : [0x82, length >> 8, length & 255];
  return Uint8Array.from([tag, ...sizes, ...Array.from(content)]);
}

function base64url(content: string | Uint8Array): string {
  const bytes = typeof content === "string" ? new TextEncoder().encode(content) : content;
  let binary = "";
  for (const byte of bytes) binary += String.fromCharCode(byte);
  return btoa(binary).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
}
