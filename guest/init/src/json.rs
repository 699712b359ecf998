//! A small JSON reader (RFC 8259). Strings are bytes: an image's environment need not be UTF-8.

/// A value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// `null`
    Null,
    /// `true`, `false`
    Bool(bool),
    /// Any number, as it was written.
    Number(String),
    /// A string, unescaped.
    String(Vec<u8>),
    /// An array.
    Array(Vec<Value>),
    /// An object's members in their order.
    Object(Vec<(Vec<u8>, Value)>),
}

/// What is wrong, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// Bytes before the place.
    pub at: usize,
    /// What was expected there.
    pub expected: &'static str,
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "expected {} at byte {}", self.expected, self.at)
    }
}

/// Deepest nesting that is read.
const MAX_DEPTH: usize = 64;

impl Value {
    /// Member of an object; the last one if it is there twice. `null` counts as absent.
    pub fn get(&self, name: &str) -> Option<&Self> {
        let Self::Object(members) = self else { return None };
        let found = members.iter().rev().find(|(key, _)| key == name.as_bytes());
        found.map(|(_, value)| value).filter(|v| **v != Self::Null)
    }

    /// The bytes of a string.
    pub fn as_bytes(&self) -> Option<&[u8]> {
        if let Self::String(s) = self { Some(s) } else { None }
    }

    /// A whole number that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        if let Self::Number(n) = self { n.parse().ok() } else { None }
    }

    /// The elements of an array.
    pub fn as_array(&self) -> Option<&[Self]> {
        if let Self::Array(a) = self { Some(a) } else { None }
    }
}

/// Reads one value and nothing after it.
///
/// # Errors
/// The first place that is not JSON.
pub fn parse(text: &[u8]) -> Result<Value, Error> {
    let mut parser = Parser { text, at: 0 };
    let value = parser.value(0)?;
    parser.space();
    if parser.at < text.len() { Err(parser.error("the end")) } else { Ok(value) }
}

struct Parser<'a> {
    text: &'a [u8],
    at: usize,
}

impl Parser<'_> {
    fn error(&self, expected: &'static str) -> Error {
        Error { at: self.at, expected }
    }

    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    /// Takes `word` if it comes next.
    fn take(&mut self, word: &[u8]) -> bool {
        let found = self.text[self.at..].starts_with(word);
        if found {
            self.at += word.len();
        }
        found
    }

    fn value(&mut self, depth: usize) -> Result<Value, Error> {
        if depth > MAX_DEPTH {
            return Err(self.error("less nesting"));
        }
        self.space();
        match self.peek() {
            Some(b'{') => self.object(depth),
            Some(b'[') => self.array(depth),
            Some(b'"') => self.string().map(Value::String),
            Some(b'-' | b'0'..=b'9') => Ok(self.number()),
            _ if self.take(b"null") => Ok(Value::Null),
            _ if self.take(b"true") => Ok(Value::Bool(true)),
            _ if self.take(b"false") => Ok(Value::Bool(false)),
            _ => Err(self.error("a value")),
        }
    }

    fn object(&mut self, depth: usize) -> Result<Value, Error> {
        self.at += 1;
        let mut members = Vec::new();
        self.space();
        if self.take(b"}") {
            return Ok(Value::Object(members));
        }
        loop {
            self.space();
            if self.peek() != Some(b'"') {
                return Err(self.error("a member's name"));
            }
            let name = self.string()?;
            self.space();
            if !self.take(b":") {
                return Err(self.error("':'"));
            }
            members.push((name, self.value(depth + 1)?));
            self.space();
            if self.take(b"}") {
                return Ok(Value::Object(members));
            }
            if !self.take(b",") {
                return Err(self.error("',' or '}'"));
            }
        }
    }

    fn array(&mut self, depth: usize) -> Result<Value, Error> {
        self.at += 1;
        let mut elements = Vec::new();
        self.space();
        if self.take(b"]") {
            return Ok(Value::Array(elements));
        }
        loop {
            elements.push(self.value(depth + 1)?);
            self.space();
            if self.take(b"]") {
                return Ok(Value::Array(elements));
            }
            if !self.take(b",") {
                return Err(self.error("',' or ']'"));
            }
        }
    }

    /// Numbers are kept as text: which ones make sense is for the reader of the field to say.
    fn number(&mut self) -> Value {
        let start = self.at;
        while matches!(self.peek(), Some(b'-' | b'+' | b'.' | b'e' | b'E' | b'0'..=b'9')) {
            self.at += 1;
        }
        Value::Number(String::from_utf8_lossy(&self.text[start..self.at]).into_owned())
    }

    fn string(&mut self) -> Result<Vec<u8>, Error> {
        self.at += 1;
        let mut out = Vec::new();
        loop {
            match self.peek() {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(out);
                }
                Some(b'\\') => self.escape(&mut out)?,
                Some(byte) if byte >= 0x20 => {
                    out.push(byte);
                    self.at += 1;
                }
                _ => return Err(self.error("the end of the string")),
            }
        }
    }

    fn escape(&mut self, out: &mut Vec<u8>) -> Result<(), Error> {
        self.at += 1;
        let byte = match self.peek() {
            Some(c @ (b'"' | b'\\' | b'/')) => c,
            Some(b'b') => 8,
            Some(b'f') => 12,
            Some(b'n') => b'\n',
            Some(b'r') => b'\r',
            Some(b't') => b'\t',
            Some(b'u') => return self.unicode(out),
            _ => return Err(self.error("an escape sequence")),
        };
        out.push(byte);
        self.at += 1;
        Ok(())
    }

    /// At the `u` of `\uXXXX`. A surrogate without its partner becomes U+FFFD.
    fn unicode(&mut self, out: &mut Vec<u8>) -> Result<(), Error> {
        self.at += 1;
        let mut code = self.hex4()?;
        if (0xd800..0xdc00).contains(&code) {
            let before = self.at;
            if self.take(b"\\u") {
                match self.hex4()? {
                    low @ 0xdc00..0xe000 => code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00),
                    _ => self.at = before,
                }
            }
        }
        let c = char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER);
        out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
        Ok(())
    }

    fn hex4(&mut self) -> Result<u32, Error> {
        let digits = self.text.get(self.at..self.at + 4).and_then(|d| {
            d.iter().try_fold(0, |sum, digit| Some(sum * 16 + char::from(*digit).to_digit(16)?))
        });
        let code = digits.ok_or_else(|| self.error("four hexadecimal digits"))?;
        self.at += 4;
        Ok(code)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(value: &Value) -> Vec<u8> {
        fn string(s: &[u8], out: &mut Vec<u8>) {
            out.push(b'"');
            for byte in s {
                match byte {
                    b'"' | b'\\' => out.extend([b'\\', *byte]),
                    0..0x20 => out.extend(format!("\\u{byte:04x}").bytes()),
                    _ => out.push(*byte),
                }
            }
            out.push(b'"');
        }
        let mut out = Vec::new();
        match value {
            Value::Null => out.extend(b"null"),
            Value::Bool(b) => out.extend(b.to_string().bytes()),
            Value::Number(n) => out.extend(n.bytes()),
            Value::String(s) => string(s, &mut out),
            Value::Array(a) => {
                out.extend(b"[ ");
                out.extend(a.iter().map(text).collect::<Vec<_>>().join(&b" ,\n"[..]));
                out.push(b']');
            }
            Value::Object(o) => {
                let member = |(k, v): &(Vec<u8>, Value)| {
                    let mut m = Vec::new();
                    string(k, &mut m);
                    m.extend(b" :");
                    m.extend(text(v));
                    m
                };
                out.push(b'{');
                out.extend(o.iter().map(member).collect::<Vec<_>>().join(&b","[..]));
                out.extend(b"}");
            }
        }
        out
    }

    fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::Bool),
            any::<i64>().prop_map(|n| Value::Number(n.to_string())),
            any::<Vec<u8>>().prop_map(Value::String),
        ];
        leaf.prop_recursive(4, 64, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::Array),
                prop::collection::vec((any::<Vec<u8>>(), inner), 0..6).prop_map(Value::Object),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(value in any_value()) {
            prop_assert_eq!(parse(&text(&value)), Ok(value));
        }

        #[test]
        fn no_input_panics(bytes in prop::collection::vec(prop_oneof![
            Just(b'{'), Just(b'"'), Just(b'\\'), Just(b'u'), Just(b'['), Just(b','), Just(b':'), any::<u8>(),
        ], 0..64)) {
            let _ = parse(&bytes);
        }
    }

    #[test]
    fn escapes() {
        let got = parse(br#""a\n\u00e9\ud83d\ude00\ud83d\u0041\"""#);
        assert_eq!(got, Ok(Value::String("a\né😀\u{fffd}A\"".into())));
    }

    #[test]
    fn errors_have_a_place() {
        assert_eq!(parse(b"[1,]"), Err(Error { at: 3, expected: "a value" }));
        assert_eq!(parse(b"{} x"), Err(Error { at: 3, expected: "the end" }));
        assert_eq!(parse(&[b'['; 100]).unwrap_err().expected, "less nesting");
    }
}
