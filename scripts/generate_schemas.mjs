// Schemas as zod 3 (by zod-to-json-schema) and zod 4 (by z.toJSONSchema) write them.
// Usage: scripts/generate_schemas.py, which installs them. Prints {"zod3": {...}, "zod4": {...}}.
import * as z4 from "zod";
import { z as z3 } from "zod3";
import { zodToJsonSchema } from "zod-to-json-schema";

const COMMON = {
  string: (z) => z.string(),
  string_min: (z) => z.string().min(3),
  string_max: (z) => z.string().max(200),
  string_both: (z) => z.string().min(2).max(50),
  string_length: (z) => z.string().length(5),
  string_nonempty: (z) => z.string().min(1),
  string_long: (z) => z.string().max(65536),
  string_regex: (z) => z.string().regex(/^[a-z]+-\d+$/),
  string_regex_max: (z) => z.string().regex(/^[a-z0-9-]+$/).max(63),
  string_regex_both: (z) => z.string().min(3).max(20).regex(/^[a-zA-Z0-9_]+$/),
  string_two_regexes: (z) => z.string().regex(/^[a-z]/).regex(/[0-9]$/),
  string_email: (z) => z.string().email(),
  string_email_max: (z) => z.string().email().max(254),
  string_url: (z) => z.string().url(),
  string_url_max: (z) => z.string().url().max(2048),
  string_uuid: (z) => z.string().uuid(),
  string_datetime: (z) => z.string().datetime(),
  string_datetime_offset: (z) => z.string().datetime({ offset: true }),
  string_date: (z) => z.string().date(),
  string_time: (z) => z.string().time(),
  string_duration: (z) => z.string().duration(),
  string_base64: (z) => z.string().base64(),
  string_cuid: (z) => z.string().cuid(),
  string_cuid2: (z) => z.string().cuid2(),
  string_ulid: (z) => z.string().ulid(),
  string_nanoid: (z) => z.string().nanoid(),
  string_starts: (z) => z.string().startsWith("https://"),
  string_ends: (z) => z.string().endsWith(".com"),
  string_includes: (z) => z.string().includes("@"),
  string_starts_ends: (z) => z.string().startsWith("a").endsWith("z"),
  string_emoji: (z) => z.string().emoji(),
  string_described: (z) => z.string().describe("A title"),
  string_default: (z) => z.string().default("x"),
  number: (z) => z.number(),
  number_min: (z) => z.number().min(0),
  number_range: (z) => z.number().min(0).max(1),
  number_positive: (z) => z.number().positive(),
  number_negative: (z) => z.number().negative(),
  number_nonnegative: (z) => z.number().nonnegative(),
  number_multiple: (z) => z.number().multipleOf(5),
  number_cents: (z) => z.number().multipleOf(0.01),
  int: (z) => z.number().int(),
  int_range: (z) => z.number().int().min(1).max(10),
  int_positive: (z) => z.number().int().positive(),
  int_multiple: (z) => z.number().int().min(0).max(100).multipleOf(5),
  boolean: (z) => z.boolean(),
  null: (z) => z.null(),
  literal: (z) => z.literal("a"),
  literal_number: (z) => z.literal(42),
  literal_true: (z) => z.literal(true),
  enum: (z) => z.enum(["red", "green", "blue"]),
  native_enum: (z) => z.nativeEnum({ Up: "UP", Down: "DOWN" }),
  native_enum_numbers: (z) => z.nativeEnum({ One: 1, Two: 2 }),
  nullable: (z) => z.string().nullable(),
  nullable_object: (z) => z.object({ a: z.string() }).nullable(),
  nullish: (z) => z.object({ a: z.string().nullish() }),
  optional: (z) => z.object({ a: z.string().optional(), b: z.number() }),
  object: (z) => z.object({ name: z.string(), age: z.number().int() }),
  object_strict: (z) => z.object({ a: z.string() }).strict(),
  object_passthrough: (z) => z.object({ a: z.string() }).passthrough(),
  object_catchall: (z) => z.object({ a: z.string() }).catchall(z.number()),
  object_partial: (z) => z.object({ a: z.string(), b: z.number() }).partial(),
  object_pick: (z) => z.object({ a: z.string(), b: z.number() }).pick({ a: true }),
  object_omit: (z) => z.object({ a: z.string(), b: z.number() }).omit({ a: true }),
  object_extend: (z) => z.object({ a: z.string() }).extend({ b: z.boolean() }),
  object_merge: (z) => z.object({ a: z.string() }).merge(z.object({ b: z.number() })),
  object_nested: (z) => z.object({ a: z.object({ b: z.object({ c: z.string() }) }) }),
  object_empty: (z) => z.object({}),
  array: (z) => z.array(z.string()),
  array_bounds: (z) => z.array(z.number()).min(1).max(3),
  array_length: (z) => z.array(z.boolean()).length(2),
  array_nonempty: (z) => z.array(z.string()).nonempty(),
  array_of_objects: (z) => z.array(z.object({ id: z.string(), tags: z.array(z.string()) })),
  tuple: (z) => z.tuple([z.string(), z.number()]),
  tuple_rest: (z) => z.tuple([z.string()]).rest(z.boolean()),
  union: (z) => z.union([z.string(), z.number()]),
  union_objects: (z) => z.union([z.object({ a: z.string() }), z.object({ b: z.number() })]),
  union_literals: (z) => z.union([z.literal("a"), z.literal("b"), z.literal(3)]),
  discriminated: (z) =>
    z.discriminatedUnion("kind", [
      z.object({ kind: z.literal("cat"), lives: z.number() }),
      z.object({ kind: z.literal("dog"), name: z.string() }),
    ]),
  intersection: (z) => z.intersection(z.object({ a: z.string() }), z.object({ b: z.number() })),
  intersection_three: (z) =>
    z.object({ a: z.string() }).and(z.object({ b: z.number() })).and(z.object({ c: z.boolean() })),
  record: (z) => z.record(z.string(), z.number()),
  record_enum: (z) => z.record(z.enum(["a", "b"]), z.number()),
  record_pattern: (z) => z.record(z.string().regex(/^[a-z]+$/), z.string()),
  record_nested: (z) => z.record(z.string(), z.object({ n: z.number() })),
  any: (z) => z.object({ a: z.any() }),
  unknown: (z) => z.object({ a: z.unknown() }),
  never: (z) => z.object({ a: z.string(), b: z.never().optional() }),
  readonly: (z) => z.object({ a: z.string() }).readonly(),
  branded: (z) => z.string().brand("Id"),
  lazy: (z) => {
    const node = z.object({ value: z.string(), children: z.lazy(() => z.array(node)) });
    return node;
  },
  shared: (z) => {
    const point = z.object({ x: z.number(), y: z.number() });
    return z.object({ from: point, to: point });
  },
  described: (z) =>
    z.object({ a: z.string().describe("what it is"), b: z.number().describe("how many") }),
  everyday: (z) =>
    z.object({
      title: z.string().min(1).max(100),
      summary: z.string().max(500),
      url: z.string().url().optional(),
      score: z.number().min(0).max(10),
      tags: z.array(z.string().max(30)).max(5),
      when: z.string().datetime(),
      status: z.enum(["open", "closed"]),
    }),
};

const NEWER = {
  email: (z) => z.email(),
  email_html5: (z) => z.email({ pattern: z.regexes.html5Email }),
  email_unicode: (z) => z.email({ pattern: z.regexes.unicodeEmail }),
  uuid: (z) => z.uuid(),
  uuidv4: (z) => z.uuidv4(),
  guid: (z) => z.guid(),
  url: (z) => z.url(),
  http_url: (z) => z.url({ protocol: /^https?$/, hostname: z.regexes.domain }),
  hostname: (z) => z.hostname(),
  emoji: (z) => z.emoji(),
  base64: (z) => z.base64(),
  base64url: (z) => z.base64url(),
  hex: (z) => z.hex(),
  jwt: (z) => z.jwt(),
  nanoid: (z) => z.nanoid(),
  cuid: (z) => z.cuid(),
  cuid2: (z) => z.cuid2(),
  ulid: (z) => z.ulid(),
  ksuid: (z) => z.ksuid(),
  xid: (z) => z.xid(),
  ipv4: (z) => z.ipv4(),
  ipv6: (z) => z.ipv6(),
  cidrv4: (z) => z.cidrv4(),
  cidrv6: (z) => z.cidrv6(),
  e164: (z) => z.e164(),
  iso_date: (z) => z.iso.date(),
  iso_time: (z) => z.iso.time(),
  iso_datetime: (z) => z.iso.datetime(),
  iso_datetime_local: (z) => z.iso.datetime({ local: true }),
  iso_duration: (z) => z.iso.duration(),
  email_bounded: (z) => z.email().min(6).max(64),
  int: (z) => z.int(),
  int32: (z) => z.int32(),
  uint32: (z) => z.uint32(),
  float32: (z) => z.float32(),
  float64: (z) => z.float64(),
  template: (z) => z.templateLiteral(["v", z.number(), ".", z.number()]),
  strict_object: (z) => z.strictObject({ a: z.string() }),
  loose_object: (z) => z.looseObject({ a: z.string() }),
  partial_record: (z) => z.partialRecord(z.enum(["a", "b"]), z.string()),
  json: (z) => z.object({ value: z.json() }),
  recursive: (z) => {
    const node = z.object({
      name: z.string(),
      get next() {
        return z.nullable(node);
      },
    });
    return node;
  },
  literal_several: (z) => z.literal(["a", "b", 3]),
  lowercase: (z) => z.string().lowercase(),
  uppercase: (z) => z.string().uppercase().max(10),
  meta: (z) => z.string().meta({ title: "T", examples: ["a"], "x-ui": "input" }),
  multiple_of_step: (z) => z.number().min(0).max(1).multipleOf(0.25),
  xor: (z) => z.xor([z.object({ a: z.string() }), z.object({ b: z.string() })]),
};

const written = { zod3: {}, zod4: {} };
for (const [name, make] of Object.entries(COMMON)) {
  written.zod3[name] = zodToJsonSchema(make(z3));
  written.zod4[name] = z4.toJSONSchema(make(z4));
}
for (const [name, make] of Object.entries(NEWER)) {
  written.zod4[`${name}_new`] = z4.toJSONSchema(make(z4));
}
for (const name of ["shared", "lazy", "everyday", "nullable", "record_enum", "tuple"]) {
  written.zod3[`${name}_openapi`] = zodToJsonSchema(COMMON[name](z3), { target: "openApi3" });
  written.zod3[`${name}_named`] = zodToJsonSchema(COMMON[name](z3), "Answer");
  written.zod4[`${name}_draft7`] = z4.toJSONSchema(COMMON[name](z4), { target: "draft-7" });
  written.zod4[`${name}_draft4`] = z4.toJSONSchema(COMMON[name](z4), { target: "draft-4" });
  written.zod4[`${name}_input`] = z4.toJSONSchema(COMMON[name](z4), { io: "input", reused: "ref" });
}
console.log(JSON.stringify(written));
