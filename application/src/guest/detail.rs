//! How what was asked is written into the audit log: one line, bounded, nothing in it that moves a
//! terminal's cursor, and no secrets.

use ghost_domain::guest::{DirectoryMake, ExecRequest, FileWrite, GuestProgram, LinkMake};

/// Most bytes of a detail.
pub(super) const MAX_DETAIL: usize = 4096;

/// A guest's or caller's string as one line of at most `most` bytes, with control characters and
/// those that change the direction of text spelled out.
pub(crate) fn escape(text: &str, most: usize) -> String {
    let mut escaped = String::with_capacity(text.len().min(most));
    for (at, character) in text.char_indices() {
        if escaped.len() >= most {
            escaped.push_str(&format!("… ({} bytes more)", text.len() - at));
            break;
        }
        match character {
            ' '..='~' => escaped.push(character),
            '\u{a0}'.. if !is_invisible(character) => escaped.push(character),
            _ => escaped.extend(character.escape_default()),
        }
    }
    escaped
}

/// Zero-width, direction and format characters, with which a line can be made to read otherwise.
const fn is_invisible(character: char) -> bool {
    matches!(
        character,
        '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e0fff}'
    )
}

/// A word of a command line: as it is where nothing in it could be misread, quoted elsewhere.
pub(super) fn word(text: &str) -> String {
    let plain = !text.is_empty()
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"_-./:=,@%+".contains(&byte));
    if plain {
        return text.to_owned();
    }
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for character in text.chars() {
        if matches!(character, '"' | '\\') {
            quoted.push('\\');
        }
        quoted.push(character);
    }
    quoted.push('"');
    quoted
}

/// What is run: arguments are kept, of variables the names only.
pub(super) fn exec(request: &ExecRequest) -> String {
    let mut words = Vec::new();
    match &request.program {
        GuestProgram::LoginShell => words.push("(login shell)".to_owned()),
        GuestProgram::Command { program, arguments } => {
            words.push(word(program));
            let mut length = 0;
            for argument in arguments {
                // What lies beyond the bound would be cut off anyway.
                if length > MAX_DETAIL {
                    words.push("…".to_owned());
                    break;
                }
                let argument = word(argument);
                length += argument.len() + 1;
                words.push(argument);
            }
        }
    }
    let mut notes = Vec::new();
    for (name, value) in [
        ("user", &request.user),
        ("group", &request.group),
        ("cwd", &request.working_directory),
    ] {
        if let Some(value) = value {
            notes.push(format!("{name}={}", word(value)));
        }
    }
    if !request.environment.is_empty() {
        let names: Vec<String> = request.environment.keys().map(|name| word(name)).collect();
        notes.push(format!("env={}", names.join(",")));
    }
    if request.terminal.is_some() {
        notes.push("tty".to_owned());
    }
    if request.stdin {
        notes.push("stdin".to_owned());
    }
    if let Some(timeout) = request.timeout {
        notes.push(format!("timeout={}s", timeout.as_secs_f64()));
    }
    // The notes come first, so that no length of arguments hides as whom something ran.
    let command = words.join(" ");
    if notes.is_empty() {
        command
    } else {
        format!("[{}] {command}", notes.join(" "))
    }
}

pub(super) fn write(file: &FileWrite) -> String {
    let owner = file
        .owner
        .map(|(uid, gid)| format!(" owner={uid}:{gid}"))
        .unwrap_or_default();
    format!(
        "{} size={} mode={:04o}{owner}",
        word(&file.path),
        file.size,
        file.mode
    )
}

pub(super) fn make(directory: &DirectoryMake) -> String {
    format!("{} mode={:04o}", word(&directory.path), directory.mode)
}

pub(super) fn link(link: &LinkMake) -> String {
    format!("{} -> {}", word(&link.path), word(&link.target))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use ghost_domain::guest::Terminal;

    use super::*;

    #[test]
    fn what_moves_a_cursor_or_turns_text_is_spelled_out() {
        assert_eq!(
            escape("a\x1b[2Jb\r\n\u{9b}c", 100),
            "a\\u{1b}[2Jb\\r\\n\\u{9b}c"
        );
        assert_eq!(escape("\u{202e}abc\u{200b}", 100), "\\u{202e}abc\\u{200b}");
        assert_eq!(escape("Grüße 日本", 100), "Grüße 日本");
        assert_eq!(escape("aaaa", 2), "aa… (2 bytes more)");
    }

    #[test]
    fn a_detail_has_arguments_and_no_secrets() {
        let mut request = ExecRequest::command("/bin/sh", ["-c", "echo \"hi\" $X"]);
        request.environment.insert("TOKEN".into(), "hunter2".into());
        request.user = Some("app".into());
        request.stdin = true;
        request.timeout = Some(Duration::from_millis(1500));
        request.terminal = Some(Terminal {
            rows: 1,
            columns: 1,
            kind: "xterm".into(),
        });
        let detail = exec(&request);
        assert_eq!(
            detail,
            "[user=app env=TOKEN tty stdin timeout=1.5s] /bin/sh -c \"echo \\\"hi\\\" $X\""
        );
        assert!(!detail.contains("hunter2"));
    }

    #[test]
    fn a_long_command_line_is_cut_off_and_says_so() {
        let request = ExecRequest::command("x", (0..4000).map(|_| "y".repeat(100)));
        let detail = escape(&exec(&request), MAX_DETAIL);
        assert!(detail.len() < MAX_DETAIL + 40, "{}", detail.len());
        assert!(detail.contains('…'));
    }
}
