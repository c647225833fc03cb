//! `vm logs`: what a VM wrote to its serial console.
//!
//! The guest is not trusted with the terminal: control sequences could clear it, change its title,
//! answer for the person, or write to the clipboard. On a terminal only line ends, tabs and
//! colours pass; all else is shown as text. Elsewhere (a file, a pipe) the bytes are the guest's.

use std::io::Write as _;

use ghost_proto::agent::v1::VmLogsRequest;

use crate::arguments::VmLogs;
use crate::connect::Session;
use crate::errors::{Exit, Failure};

pub(super) async fn run(args: VmLogs, session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    let failed = |status| agent.failure(&status);
    let mut stream = agent
        .vms()
        .logs(VmLogsRequest {
            vm: args.name,
            follow: args.follow,
            tail_bytes: args.tail.unwrap_or(0),
        })
        .await
        .map_err(failed)?
        .into_inner();
    let mut filter = (session.printer.stdout_is_terminal() && !args.raw).then(Filter::default);
    while let Some(output) = stream.message().await.map_err(failed)? {
        match &mut filter {
            Some(filter) => session.printer.bytes(&filter.pass(&output.data))?,
            None => session.printer.bytes(&output.data)?,
        }
    }
    if let Some(filter) = &mut filter {
        session.printer.bytes(&filter.end())?;
    }
    Ok(Exit::Done)
}

/// Makes a stream of bytes safe for a terminal, whatever pieces it comes in.
#[derive(Default)]
struct Filter {
    /// The beginning of an escape sequence or of a UTF-8 character, not yet decided on.
    pending: Vec<u8>,
    /// Whether a colour is set that has to be reset at the end.
    coloured: bool,
}

/// A colour sequence is a few bytes; what is longer is no colour.
const LONGEST_COLOUR: usize = 32;

impl Filter {
    fn pass(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(bytes.len());
        for &byte in bytes {
            self.pending.push(byte);
            self.decide(&mut out);
        }
        out
    }

    /// What is left when nothing more comes.
    fn end(&mut self) -> Vec<u8> {
        let mut out = Vec::new();
        for byte in std::mem::take(&mut self.pending) {
            show(byte, &mut out);
        }
        if self.coloured {
            out.extend_from_slice(b"\x1b[0m");
        }
        out
    }

    fn decide(&mut self, out: &mut Vec<u8>) {
        let Some(&first) = self.pending.first() else {
            return;
        };
        match first {
            0x1b => self.decide_escape(out),
            0x80.. => self.decide_utf8(out),
            _ => {
                self.pending.clear();
                show(first, out);
            }
        }
    }

    /// SGR (`ESC [ digits ; : m`, ECMA-48 8.3.117) is the one sequence that passes.
    fn decide_escape(&mut self, out: &mut Vec<u8>) {
        match self.pending.as_slice() {
            [_] | [_, b'['] => {}
            [_, b'[', parameters @ .., b'm'] if parameters.iter().all(|b| is_parameter(*b)) => {
                self.coloured = !matches!(parameters, [] | [b'0']);
                out.append(&mut self.pending);
            }
            [_, b'[', parameters @ ..]
                if parameters.iter().all(|b| is_parameter(*b))
                    && parameters.len() < LONGEST_COLOUR => {}
            _ => self.show_first(out),
        }
    }

    /// A whole character passes unless it is a C1 control; what is no UTF-8 is shown as bytes.
    fn decide_utf8(&mut self, out: &mut Vec<u8>) {
        match std::str::from_utf8(&self.pending) {
            Ok(text) if text.chars().any(char::is_control) => self.show_first(out),
            Ok(_) => out.append(&mut self.pending),
            Err(error) if error.error_len().is_none() => {}
            Err(_) => self.show_first(out),
        }
    }

    /// Gives the first byte up as text and decides on the rest anew.
    fn show_first(&mut self, out: &mut Vec<u8>) {
        let rest = self.pending.split_off(1);
        for byte in std::mem::take(&mut self.pending) {
            show(byte, out);
        }
        for byte in rest {
            self.pending.push(byte);
            self.decide(out);
        }
    }
}

fn is_parameter(byte: u8) -> bool {
    byte.is_ascii_digit() || matches!(byte, b';' | b':')
}

fn show(byte: u8, out: &mut Vec<u8>) {
    match byte {
        b'\n' | b'\r' | b'\t' | b' '..=b'~' => out.push(byte),
        // Caret notation, as in stty and cat -v.
        0..0x20 | 0x7f => out.extend_from_slice(&[b'^', byte ^ 0x40]),
        // A vector takes everything.
        0x80.. => drop(write!(out, "\\x{byte:02x}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filtered(pieces: &[&[u8]]) -> String {
        let mut filter = Filter::default();
        let mut out: Vec<u8> = pieces.iter().flat_map(|piece| filter.pass(piece)).collect();
        out.extend(filter.end());
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn text_and_colours_pass() {
        let text = "ok\r\n\t\x1b[1;31mred\x1b[0m Grüße 東京\n";
        assert_eq!(filtered(&[text.as_bytes()]), text);
    }

    #[test]
    fn what_drives_a_terminal_is_shown() {
        for (bytes, shown) in [
            (&b"\x1b[2J"[..], "^[[2J"),
            (b"\x1b]0;title\x07", "^[]0;title^G"),
            (b"\x1b]52;c;AAAA\x1b\\", "^[]52;c;AAAA^[\\"),
            (b"\x1bc", "^[c"),
            (b"\x9b2J", "\\x9b2J"),
            (b"\xc2\x9b2J", "\\xc2\\x9b2J"),
            (b"a\x08\x7f", "a^H^?"),
            (b"\xff\xfe", "\\xff\\xfe"),
            (b"\x1b[31", "^[[31"),
            (b"\x1b\x1b[2J", "^[^[[2J"),
        ] {
            assert_eq!(filtered(&[bytes]), shown);
        }
    }

    #[test]
    fn a_colour_left_on_is_reset() {
        assert_eq!(filtered(&[b"\x1b[31mred"]), "\x1b[31mred\x1b[0m");
    }

    #[test]
    fn pieces_make_no_difference() {
        let bytes = "x\x1b[31mé東\x1b[2J\u{9b}\x1b[0m\n".as_bytes();
        let whole = filtered(&[bytes]);
        let pieces: Vec<&[u8]> = bytes.chunks(1).collect();
        assert_eq!(filtered(&pieces), whole);
    }

    #[test]
    fn an_endless_sequence_is_not_kept_in_memory() {
        let mut filter = Filter::default();
        filter.pass(b"\x1b[");
        for _ in 0..10_000 {
            filter.pass(b"1");
            assert!(filter.pending.len() <= LONGEST_COLOUR + 2);
        }
    }
}
