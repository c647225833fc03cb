//! A configuration as text.

use super::{Leaf, Loaded, Origin, Schema, Visitor};

/// The values in effect, each with where it came from, or with the variable that overrules it. The
/// text is itself a configuration.
pub fn show<C: Schema>(loaded: &Loaded<C>, environment: bool) -> String {
    struct Writer<'a, C> {
        loaded: &'a Loaded<C>,
        environment: bool,
        out: String,
    }

    impl<C> Writer<'_, C> {
        fn line(&mut self, path: &str, value: &str, comment: &str) {
            let depth = path.matches('.').count();
            let key = path.rsplit('.').next().unwrap_or(path);
            let text = format!("{:indent$}{key}:{value}", "", indent = depth * 2);
            if comment.is_empty() {
                self.out.push_str(&text);
            } else {
                self.out.push_str(&format!("{text:<48}  # {comment}"));
            }
            self.out.push('\n');
        }
    }

    impl<C: Schema> Visitor for Writer<'_, C> {
        fn section(&mut self, path: &str) {
            self.line(path, "", "");
        }

        fn leaf(&mut self, path: &str, value: &mut dyn Leaf) {
            let comment = if self.environment {
                C::PROGRAM.variable(path)
            } else {
                match (self.loaded.origins.get(path), &self.loaded.file) {
                    (Some(Origin::File { line, .. }), Some(file)) => {
                        format!("{}:{line}", file.display())
                    }
                    (Some(Origin::Environment(name)), _) => name.clone(),
                    _ => "default".into(),
                }
            };
            let shown = format!(" {}", value.show());
            self.line(path, &shown, &comment);
        }
    }

    let mut config = loaded.config.clone();
    let mut writer = Writer {
        loaded,
        environment,
        out: String::new(),
    };
    config.visit(&mut writer);
    writer.out
}
