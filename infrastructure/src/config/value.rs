//! The kinds of value that a key may have: how each is read, what is legal, and how it is shown.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ghost_domain::ByteSize;

use super::tree::Node;

/// What somebody wrote as a value.
#[derive(Clone, Copy, Debug)]
pub enum Given<'a> {
    /// In the file.
    File(&'a Node),
    /// In the environment.
    Environment(&'a str),
}

/// Why a value is refused, and what to write instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What is wrong with it.
    pub message: String,
    /// What to write.
    pub hint: Option<String>,
}

/// Refuses a value.
///
/// # Errors
/// Always: it is the way to say no.
pub fn refuse<T>(message: impl Into<String>, hint: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal {
        message: message.into(),
        hint: Some(hint.into()),
    })
}

/// A value of a key.
pub trait Leaf {
    /// Takes over what was given, or says why not and stays as it was.
    ///
    /// # Errors
    /// What is wrong with it, and what to write instead.
    fn read(&mut self, given: Given<'_>) -> Result<(), Refusal>;

    /// The value as it is written in the file.
    fn show(&self) -> String;
}

/// A value that is read from one piece of text.
pub trait Scalar: Sized {
    /// How it is written, for the hint of every refusal.
    const EXAMPLE: &'static str;
    /// Whether plain numbers, `true` and `false` are taken as they are; text is not a number,
    /// and `name: 1.20` would not be the 1.20 that was meant.
    const PLAIN: bool;

    /// Reads it.
    ///
    /// # Errors
    /// What is wrong with it, and what to write instead.
    fn from_text(text: &str) -> Result<Self, Refusal>;

    /// Writes it so that [`Self::from_text`] reads the same.
    fn to_text(&self) -> String;
}

/// Reads one piece of text.
fn scalar<T: Scalar>(given: Given<'_>) -> Result<T, Refusal> {
    let text = match given {
        Given::Environment(text) => text.to_owned(),
        Given::File(node @ (Node::Number(_) | Node::Bool(_))) if !T::PLAIN => {
            let text = node.scalar().unwrap_or_default();
            return refuse(
                format!("text is expected here, not {}", node.kind()),
                format!("put it in quotes: \"{text}\""),
            );
        }
        Given::File(node) => match node.scalar() {
            Some(text) => text,
            None => {
                return refuse(
                    format!("a value is expected here, not {}", node.kind()),
                    format!("write for example {}", T::EXAMPLE),
                );
            }
        },
    };
    T::from_text(&text)
}

impl<T: Scalar> Leaf for T {
    fn read(&mut self, given: Given<'_>) -> Result<(), Refusal> {
        *self = scalar(given)?;
        Ok(())
    }

    fn show(&self) -> String {
        let text = self.to_text();
        // Plain where YAML reads it back as what it is, else in quotes.
        let plain = match super::tree::parse(&format!("v: {text}")) {
            Ok(Node::Map(entries)) => match entries.first().map(|entry| &entry.value) {
                Some(Node::Text(read)) => *read == text,
                Some(node) => {
                    let again = node.scalar().map(|read| T::from_text(&read));
                    T::PLAIN && matches!(again, Some(Ok(again)) if again.to_text() == text)
                }
                None => false,
            },
            _ => false,
        };
        if plain { text } else { in_quotes(&text) }
    }
}

/// In double quotes, as JSON and YAML both read it.
fn in_quotes(text: &str) -> String {
    let mut out = String::from("\"");
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            control if control.is_control() => {
                out.push_str(&format!("\\u{:04x}", u32::from(control)));
            }
            other => out.push(other),
        }
    }
    out.push('"');
    out
}

impl Scalar for bool {
    const EXAMPLE: &'static str = "true or false";
    const PLAIN: bool = true;

    fn from_text(text: &str) -> Result<Self, Refusal> {
        match text {
            "true" => Ok(true),
            "false" => Ok(false),
            _ => refuse(
                format!("{text:?} is neither true nor false"),
                "write true or false",
            ),
        }
    }

    fn to_text(&self) -> String {
        self.to_string()
    }
}

impl Scalar for u32 {
    const EXAMPLE: &'static str = "2";
    const PLAIN: bool = true;

    fn from_text(text: &str) -> Result<Self, Refusal> {
        text.parse().or_else(|_| {
            refuse(
                format!("{text:?} is not a whole number from 0 to {}", u32::MAX),
                "write for example 2",
            )
        })
    }

    fn to_text(&self) -> String {
        self.to_string()
    }
}

impl Scalar for ByteSize {
    const EXAMPLE: &'static str = "2GiB";
    const PLAIN: bool = true;

    fn from_text(text: &str) -> Result<Self, Refusal> {
        text.parse().map_err(|error: ghost_domain::Error| Refusal {
            message: error.to_string(),
            hint: error.hint_text().map(str::to_owned),
        })
    }

    fn to_text(&self) -> String {
        let bytes = self.bytes();
        [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)]
            .into_iter()
            .find(|(_, shift)| bytes != 0 && bytes.is_multiple_of(1 << shift))
            .map_or_else(
                || bytes.to_string(),
                |(unit, shift)| format!("{}{unit}", bytes >> shift),
            )
    }
}

impl Scalar for Duration {
    const EXAMPLE: &'static str = "30s";
    const PLAIN: bool = true;

    fn from_text(text: &str) -> Result<Self, Refusal> {
        let hint = "write a number with ms, s, m, h or d, for example 30s";
        let split = text
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let Ok(number) = number.parse::<u64>() else {
            return refuse(format!("{text:?} is not a length of time"), hint);
        };
        let milliseconds = match unit {
            "ms" => Some(1),
            "s" => Some(1_000),
            "m" => Some(60_000),
            "h" => Some(3_600_000),
            "d" => Some(86_400_000),
            "" => return refuse(format!("{text:?} has no unit"), hint),
            _ => None,
        };
        // A year is longer than anything here can mean.
        const LONGEST: u64 = 366 * 86_400_000;
        match milliseconds.and_then(|unit: u64| number.checked_mul(unit)) {
            Some(length) if length <= LONGEST => Ok(Self::from_millis(length)),
            Some(_) => refuse(format!("{text:?} is longer than a year"), hint),
            None => refuse(format!("{text:?} is not a length of time"), hint),
        }
    }

    fn to_text(&self) -> String {
        let milliseconds = self.as_millis();
        [
            ("d", 86_400_000),
            ("h", 3_600_000),
            ("m", 60_000),
            ("s", 1_000),
        ]
        .into_iter()
        .find(|(_, unit)| milliseconds != 0 && milliseconds.is_multiple_of(*unit))
        .map_or_else(
            || format!("{milliseconds}ms"),
            |(name, unit)| format!("{}{name}", milliseconds / unit),
        )
    }
}

/// How many times over a resource may be promised, in hundredths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ratio(pub u32);

impl Ratio {
    /// In percent: 100 promises each unit once.
    pub const fn percent(self) -> u32 {
        self.0
    }
}

impl Scalar for Ratio {
    const EXAMPLE: &'static str = "4.0";
    const PLAIN: bool = true;

    fn from_text(text: &str) -> Result<Self, Refusal> {
        match text.parse::<f64>() {
            Ok(ratio) if (0.1..=100.0).contains(&ratio) => {
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "at most 10,000"
                )]
                let percent = (ratio * 100.0).round() as u32;
                Ok(Self(percent))
            }
            _ => refuse(
                format!("{text:?} is not a ratio from 0.1 to 100"),
                "write for example 4.0: four are promised for each one that is there",
            ),
        }
    }

    fn to_text(&self) -> String {
        let (whole, part) = (self.0 / 100, self.0 % 100);
        if part.is_multiple_of(10) {
            format!("{whole}.{}", part / 10)
        } else {
            format!("{whole}.{part:02}")
        }
    }
}

/// A part of a whole, 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fraction(pub f64);

impl Scalar for Fraction {
    const EXAMPLE: &'static str = "0.1";
    const PLAIN: bool = true;

    fn from_text(text: &str) -> Result<Self, Refusal> {
        match text.parse::<f64>() {
            Ok(fraction) if (0.0..=1.0).contains(&fraction) => Ok(Self(fraction)),
            _ => refuse(
                format!("{text:?} is not a number from 0 to 1"),
                "write 1.0 for all, 0.1 for each tenth",
            ),
        }
    }

    fn to_text(&self) -> String {
        format!("{:?}", self.0)
    }
}

/// A path from the root: a program that a service manager starts has no folder of its own that a
/// relative one could be meant from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FullPath(pub PathBuf);

impl FullPath {
    /// A default.
    pub fn new(path: &str) -> Self {
        Self(PathBuf::from(path))
    }

    /// The path.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Scalar for FullPath {
    const EXAMPLE: &'static str = "/var/lib/ghost";
    const PLAIN: bool = true;

    fn from_text(text: &str) -> Result<Self, Refusal> {
        if !text.starts_with('/') || text.contains('\0') {
            return refuse(
                format!("{text:?} is not an absolute path"),
                "write the whole path, from /",
            );
        }
        Ok(Self::new(text))
    }

    fn to_text(&self) -> String {
        self.0.to_string_lossy().into_owned()
    }
}

/// Where a Unix socket is made, or `off`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketPath(pub Option<PathBuf>);

impl Scalar for SocketPath {
    const EXAMPLE: &'static str = "/run/ghost/agent.sock, or off";
    const PLAIN: bool = true;

    fn from_text(text: &str) -> Result<Self, Refusal> {
        if text == "off" {
            return Ok(Self(None));
        }
        // sockaddr_un has room for 108 bytes with the closing zero (unix(7)); the socket is first
        // bound under a short name in the same folder.
        if text.len() > 107 {
            return refuse(
                format!("{text:?} is too long for a Unix socket"),
                "choose a path of at most 107 bytes",
            );
        }
        FullPath::from_text(text).map(|path| Self(Some(path.0)))
    }

    fn to_text(&self) -> String {
        self.0
            .as_ref()
            .map_or_else(|| "off".into(), |path| path.to_string_lossy().into_owned())
    }
}

/// Where a listener listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listen {
    /// Nowhere.
    Off,
    /// At a port on all addresses, IPv6 and IPv4.
    All(u16),
    /// At one address.
    At(SocketAddr),
}

impl Listen {
    /// Whether only this host can reach it.
    pub const fn is_loopback(self) -> bool {
        match self {
            Self::Off => true,
            Self::All(_) => false,
            Self::At(address) => match address.ip() {
                IpAddr::V4(ip) => ip.is_loopback(),
                IpAddr::V6(ip) => ip.is_loopback(),
            },
        }
    }

    /// The address to bind; for all addresses the IPv6 one, which takes IPv4 too.
    pub const fn address(self) -> Option<SocketAddr> {
        match self {
            Self::Off => None,
            Self::All(port) => Some(SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port)),
            Self::At(address) => Some(address),
        }
    }
}

impl Listen {
    /// Whether two listeners want the same port of the same address.
    pub(super) fn collides(self, other: Self) -> bool {
        match (self.address(), other.address()) {
            (Some(one), Some(other)) => {
                one.port() != 0
                    && one.port() == other.port()
                    && (one.ip() == other.ip()
                        || one.ip().is_unspecified()
                        || other.ip().is_unspecified())
            }
            _ => false,
        }
    }
}

impl Scalar for Listen {
    const EXAMPLE: &'static str = "127.0.0.1:9090, [::1]:9090, :9090 for all addresses, or off";
    const PLAIN: bool = true;

    fn from_text(text: &str) -> Result<Self, Refusal> {
        let port = |text: &str| text.parse::<u16>().ok();
        let known = if text == "off" {
            Some(Self::Off)
        } else if let Some(rest) = text.strip_prefix("localhost:") {
            port(rest).map(|port| Self::At((Ipv4Addr::LOCALHOST, port).into()))
        } else if let Some(rest) = text.strip_prefix(':').or_else(|| text.strip_prefix("*:")) {
            port(rest).map(Self::All)
        } else {
            text.parse().ok().map(Self::At)
        };
        match known {
            Some(listen) => Ok(listen),
            None => refuse(
                format!("{text:?} is not an address with a port"),
                format!("write for example {}", Self::EXAMPLE),
            ),
        }
    }

    fn to_text(&self) -> String {
        match self {
            Self::Off => "off".into(),
            Self::All(port) => format!(":{port}"),
            Self::At(address) => address.to_string(),
        }
    }
}

/// What a program, or a network, is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name(pub String);

impl Scalar for Name {
    const EXAMPLE: &'static str = "basement";
    const PLAIN: bool = false;

    fn from_text(text: &str) -> Result<Self, Refusal> {
        let legal = (1..=63).contains(&text.len())
            && text
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
            && text.starts_with(|c: char| c.is_ascii_alphanumeric());
        if legal {
            Ok(Self(text.to_owned()))
        } else {
            refuse(
                format!("{text:?} is not a legal name"),
                "1 to 63 letters, digits, '-', '.' and '_', starting with a letter or digit",
            )
        }
    }

    fn to_text(&self) -> String {
        self.0.clone()
    }
}

/// Which lines are logged: a level, or directives such as `info,ghost_infrastructure=debug`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogLevel(pub String);

impl Scalar for LogLevel {
    const EXAMPLE: &'static str = "info";
    const PLAIN: bool = true;

    fn from_text(text: &str) -> Result<Self, Refusal> {
        crate::telemetry::check_filter(text).map_err(|cause| Refusal {
            message: format!("{text:?} is not a log level: {cause}"),
            hint: Some(
                "write error, warn, info, debug or trace, or info,ghost_infrastructure=debug"
                    .into(),
            ),
        })?;
        Ok(Self(text.to_owned()))
    }

    fn to_text(&self) -> String {
        self.0.clone()
    }
}

/// Where traces are sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint(pub String);

impl Scalar for Endpoint {
    const EXAMPLE: &'static str = "http://127.0.0.1:4317";
    const PLAIN: bool = true;

    fn from_text(text: &str) -> Result<Self, Refusal> {
        crate::telemetry::check_endpoint(text).map_err(|cause| Refusal {
            message: format!("{text:?} is not the address of a collector: {cause}"),
            hint: Some(format!("write for example {}", Self::EXAMPLE)),
        })?;
        Ok(Self(text.to_owned()))
    }

    fn to_text(&self) -> String {
        self.0.clone()
    }
}

/// A value that may be left to the program: `null` in the file, nothing in the environment.
impl<T: Scalar> Leaf for Option<T> {
    fn read(&mut self, given: Given<'_>) -> Result<(), Refusal> {
        *self = match given {
            Given::File(Node::Null) | Given::Environment("") => None,
            given => Some(scalar(given)?),
        };
        Ok(())
    }

    fn show(&self) -> String {
        self.as_ref().map_or_else(|| "null".into(), Leaf::show)
    }
}

/// Some values: a list in the file, commas between them in the environment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct List<T>(pub Vec<T>);

impl<T> Default for List<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

/// Most items of a list.
const MOST_ITEMS: usize = 64;

impl<T: Scalar> Leaf for List<T> {
    fn read(&mut self, given: Given<'_>) -> Result<(), Refusal> {
        let items: Vec<T> = match given {
            Given::Environment(text) => text
                .split(',')
                .map(str::trim)
                .filter(|item| !item.is_empty())
                .map(|item| scalar(Given::Environment(item)))
                .collect::<Result<_, _>>()?,
            Given::File(Node::List(items)) => items
                .iter()
                .map(|item| scalar(Given::File(item)))
                .collect::<Result<_, _>>()?,
            Given::File(node) => {
                return refuse(
                    format!("a list is expected here, not {}", node.kind()),
                    format!("write for example [{}], or [] for none", T::EXAMPLE),
                );
            }
        };
        if items.len() > MOST_ITEMS {
            return refuse(
                format!("{} items are too many", items.len()),
                format!("at most {MOST_ITEMS} are possible"),
            );
        }
        self.0 = items;
        Ok(())
    }

    fn show(&self) -> String {
        let items: Vec<_> = self
            .0
            .iter()
            .map(|item| in_quotes(&item.to_text()))
            .collect();
        format!("[{}]", items.join(", "))
    }
}

/// Names and addresses that the server's certificate is to hold besides what the program finds out.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct ServerNames(pub Vec<String>);

impl Leaf for ServerNames {
    fn read(&mut self, given: Given<'_>) -> Result<(), Refusal> {
        let names: Vec<String> = match given {
            Given::Environment(text) => text
                .split(',')
                .map(|name| name.trim().to_owned())
                .filter(|name| !name.is_empty())
                .collect(),
            Given::File(Node::List(items)) => items
                .iter()
                .map(|item| item.scalar().unwrap_or_else(|| item.kind().to_owned()))
                .collect(),
            Given::File(node) => {
                return refuse(
                    format!("a list is expected here, not {}", node.kind()),
                    "write for example [ghost.example.org, 203.0.113.7], or [] for none",
                );
            }
        };
        for name in &names {
            if name.parse::<IpAddr>().is_err() && !is_dns_name(name) {
                return refuse(
                    format!("{name:?} is neither a DNS name nor an IP address"),
                    "write for example [ghost.example.org, 203.0.113.7]",
                );
            }
        }
        self.0 = names;
        Ok(())
    }

    fn show(&self) -> String {
        let names: Vec<_> = self.0.iter().map(|name| in_quotes(name)).collect();
        format!("[{}]", names.join(", "))
    }
}

/// RFC 1123 labels.
fn is_dns_name(name: &str) -> bool {
    name.len() <= 253
        && name.split('.').all(|label| {
            (1..=63).contains(&label.len())
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b == b'-')
        })
}

/// Makes a type a value out of a few: `config_choice!(Colour { "red" => Colour::Red, })`.
#[macro_export]
macro_rules! config_choice {
    ($type:ty { $($text:literal => $value:expr,)* }) => {
        impl $crate::config::Scalar for $type {
            const EXAMPLE: &'static str = concat!($($text, " ",)*);
            const PLAIN: bool = true;

            fn from_text(text: &str) -> Result<Self, $crate::config::Refusal> {
                match text {
                    $($text => Ok($value),)*
                    _ => {
                        let all = [$($text),*];
                        $crate::config::refuse(
                            format!("{text:?} is none of {}", all.join(", ")),
                            $crate::config::nearest(text, all).map_or_else(
                                || format!("write one of {}", all.join(", ")),
                                |near| format!("did you mean {near}?"),
                            ),
                        )
                    }
                }
            }

            fn to_text(&self) -> String {
                [$(($value, $text)),*]
                    .into_iter()
                    .find_map(|(value, text)| (value == *self).then(|| text.to_owned()))
                    .unwrap_or_default()
            }
        }
    };
}

use crate::libvirt::AcceleratorChoice;
use crate::store::Engine;
use crate::telemetry::LogFormat;
use ghost_domain::guest::GuestInject;

config_choice!(AcceleratorChoice {
    "auto" => AcceleratorChoice::Auto,
    "kvm" => AcceleratorChoice::Kvm,
    "tcg" => AcceleratorChoice::Tcg,
});
config_choice!(GuestInject {
    "auto" => GuestInject::Auto,
    "always" => GuestInject::Always,
    "never" => GuestInject::Never,
});
config_choice!(Engine {
    "sled" => Engine::Sled,
    "redb" => Engine::Redb,
});
config_choice!(LogFormat {
    "text" => LogFormat::Text,
    "json" => LogFormat::Json,
});

#[cfg(test)]
mod tests {
    use super::*;

    fn read<T: Scalar>(text: &str) -> Result<String, String> {
        T::from_text(text)
            .map(|value| value.to_text())
            .map_err(|refusal| {
                format!("{} ({})", refusal.message, refusal.hint.unwrap_or_default())
            })
    }

    #[test]
    fn lengths_of_time_need_their_unit() {
        assert_eq!(read::<Duration>("90s").unwrap(), "90s");
        assert_eq!(read::<Duration>("120s").unwrap(), "2m");
        assert_eq!(read::<Duration>("1500ms").unwrap(), "1500ms");
        assert_eq!(read::<Duration>("0s").unwrap(), "0ms");
        for bad in [
            "30",
            "",
            "s",
            "-1s",
            "1.5s",
            "1w",
            "99999999999999999999s",
            "400d",
        ] {
            assert!(read::<Duration>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn listeners_are_told_apart() {
        for (text, shown, loopback) in [
            (":9090", ":9090", false),
            ("*:9090", ":9090", false),
            ("localhost:80", "127.0.0.1:80", true),
            ("[::1]:80", "[::1]:80", true),
            ("0.0.0.0:80", "0.0.0.0:80", false),
            ("127.8.9.1:80", "127.8.9.1:80", true),
            ("off", "off", true),
        ] {
            let listen = Listen::from_text(text).unwrap();
            assert_eq!(listen.to_text(), shown);
            assert_eq!(listen.is_loopback(), loopback, "{text}");
        }
        for bad in ["", "9090", "host:9090", ":99999", "127.0.0.1", "::1:9090"] {
            assert!(read::<Listen>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ratios_are_kept_in_hundredths() {
        assert_eq!(Ratio::from_text("4.0").unwrap().percent(), 400);
        assert_eq!(Ratio::from_text("1.15").unwrap().percent(), 115);
        assert_eq!(read::<Ratio>("1.15").unwrap(), "1.15");
        for bad in ["0", "-1", "NaN", "inf", "101", "many"] {
            assert!(read::<Ratio>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn choices_offer_the_nearest() {
        let refusal = read::<Engine>("sledd").unwrap_err();
        assert!(refusal.contains("did you mean sled?"), "{refusal}");
        let refusal = read::<LogFormat>("xml").unwrap_err();
        assert!(refusal.contains("write one of text, json"), "{refusal}");
    }

    #[test]
    fn text_is_not_a_number() {
        let mut name = Name(String::new());
        let refusal = name
            .read(Given::File(&Node::Number("1.2".into())))
            .unwrap_err();
        assert!(refusal.hint.unwrap().contains("quotes"));
        name.read(Given::Environment("1.2")).unwrap();
        assert_eq!(name.0, "1.2");
    }

    #[test]
    fn server_names_are_names_or_addresses() {
        let mut names = ServerNames::default();
        names
            .read(Given::Environment("a.example, 203.0.113.7"))
            .unwrap();
        assert_eq!(names.show(), r#"["a.example", "203.0.113.7"]"#);
        for bad in ["-a", "a..b", "a b", "a/b"] {
            assert!(names.read(Given::Environment(bad)).is_err(), "{bad}");
        }
    }
}
