//! `context add|list|use|show|remove`.

use std::io::Read;

use serde::Serialize;

use crate::arguments::{ContextAdd, ContextCommand};
use crate::connect::{DEFAULT_SOCKET, Endpoint, Session};
use crate::errors::{Exit, Failure};
use crate::identity::{Context, Contexts, LOCAL, Settings, Token, enrol};
use crate::table::{Paint, Sheet, Table};
use crate::text::{printable, time_until};

/// A context as `-o json` shows it.
#[derive(Serialize)]
struct ContextView {
    name: String,
    current: bool,
    endpoint: String,
    role: Option<String>,
    identity: Option<String>,
    certificate_expires_at: Option<String>,
    authority_fingerprint: Option<String>,
}

pub(super) async fn run(command: ContextCommand, session: &Session) -> Result<Exit, Failure> {
    let contexts = Contexts::open()?;
    match command {
        ContextCommand::Add(args) => add(args, &contexts, session).await?,
        ContextCommand::List => list(&contexts, session)?,
        ContextCommand::Use(args) => {
            contexts.activate(&args.name)?;
            session.printer.note(&format!("now in use: {}", args.name));
        }
        ContextCommand::Show(args) => {
            let current = current_name(&contexts)?;
            let view = if args.name == LOCAL {
                local(&current)
            } else {
                view(&contexts.load(&args.name)?, &current)
            };
            session
                .printer
                .several(std::slice::from_ref(&view), 1, |view| &view.name, sheet)?;
        }
        ContextCommand::Remove(args) => {
            contexts.remove(&args.name)?;
            session.printer.note(&format!(
                "removed {}; its certificate stays valid until it ends or: ghostctl trust revoke ID",
                args.name
            ));
        }
    }
    Ok(Exit::Done)
}

async fn add(args: ContextAdd, contexts: &Contexts, session: &Session) -> Result<(), Failure> {
    contexts.check_free(&args.name, args.replace)?;
    let endpoint = session.endpoint_flag().ok_or_else(|| {
        Failure::usage("--endpoint is missing")
            .hint("ghostctl context add NAME --endpoint https://HOST:9090 --token TOKEN")
    })?;
    let endpoint = Endpoint::parse(endpoint)?;
    let context = match (&endpoint, args.token) {
        (Endpoint::Tls { .. }, Some(token)) => {
            let token = Token::parse(&read_token(token)?)?;
            let identity = args.identity.unwrap_or_else(default_identity);
            enrol::enrol(
                contexts,
                &args.name,
                &endpoint,
                &token,
                &identity,
                session.trace(),
            )
            .await?
        }
        (Endpoint::Tls { .. }, None) => {
            return Err(Failure::usage("an https endpoint needs --token")
                .hint("on that host: ghostctl trust token --role operator"));
        }
        (Endpoint::Unix(_) | Endpoint::Plain { .. }, Some(_)) => {
            return Err(Failure::usage(format!("{endpoint} needs no --token")));
        }
        (Endpoint::Unix(_) | Endpoint::Plain { .. }, None) => contexts.save(
            &args.name,
            Settings {
                endpoint: endpoint.to_string(),
                identity: None,
                role: None,
            },
            None,
        )?,
    };
    if args.activate {
        contexts.activate(&context.name)?;
    }
    let view = view(&context, &current_name(contexts)?);
    session
        .printer
        .several(std::slice::from_ref(&view), 1, |view| &view.name, sheet)?;
    if !view.current {
        session.printer.note(&format!(
            "use it with --context {0}, or always: ghostctl context use {0}",
            view.name
        ));
    }
    Ok(())
}

/// A token is a secret: `-` keeps it out of the shell's history and the process list.
fn read_token(token: String) -> Result<String, Failure> {
    if token != "-" {
        return Ok(token);
    }
    let mut text = String::new();
    std::io::stdin()
        .take(4096)
        .read_to_string(&mut text)
        .map_err(|error| Failure::io("stdin cannot be read", &error))?;
    Ok(text)
}

/// Under which name the agent lists us.
fn default_identity() -> String {
    let user = std::env::var("USER").unwrap_or_else(|_| "ghostctl".to_owned());
    let host = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned();
    format!("{user}@{host}")
}

fn list(contexts: &Contexts, session: &Session) -> Result<(), Failure> {
    let current = current_name(contexts)?;
    let mut views = vec![local(&current)];
    for name in contexts.names()? {
        match contexts.load(&name) {
            Ok(context) => views.push(view(&context, &current)),
            // A damaged one must not hide the others.
            Err(failure) => session.failed(&failure),
        }
    }
    session.printer.list(
        &views,
        |view| &view.name,
        |views| {
            let mut table =
                Table::new(&["CURRENT", "NAME", "ENDPOINT", "ROLE", "CERTIFICATE ENDS"]);
            for view in views {
                table.row([
                    if view.current { "*" } else { "" }.to_owned(),
                    view.name.clone(),
                    view.endpoint.clone(),
                    view.role.clone().unwrap_or_else(|| "-".to_owned()),
                    ends(view),
                ]);
            }
            table
        },
    )
}

fn ends(view: &ContextView) -> String {
    match &view.certificate_expires_at {
        Some(at) => time_until(Some(at)),
        None => "-".to_owned(),
    }
}

fn current_name(contexts: &Contexts) -> Result<String, Failure> {
    Ok(contexts.current_name()?.unwrap_or_else(|| LOCAL.to_owned()))
}

fn local(current: &str) -> ContextView {
    ContextView {
        name: LOCAL.to_owned(),
        current: current == LOCAL,
        endpoint: format!("unix:{DEFAULT_SOCKET}"),
        role: None,
        identity: None,
        certificate_expires_at: None,
        authority_fingerprint: None,
    }
}

fn view(context: &Context, current: &str) -> ContextView {
    let expires_at = context.validity().and_then(|validity| {
        ghost_proto::view::rfc3339(&prost_types::Timestamp {
            seconds: validity.end.unix_timestamp(),
            nanos: 0,
        })
    });
    ContextView {
        name: context.name.clone(),
        current: current == context.name,
        endpoint: context.endpoint.to_string(),
        role: context.settings.role.clone(),
        identity: context.settings.identity.clone(),
        certificate_expires_at: expires_at,
        authority_fingerprint: context
            .authority_fingerprint()
            .map(|fingerprint| fingerprint.to_string()),
    }
}

fn sheet(view: &ContextView, paint: Paint) -> String {
    let mut sheet = Sheet::new();
    sheet
        .line("name", &view.name)
        .line("endpoint", &view.endpoint)
        .some("role", view.role.as_ref())
        .some("identity", view.identity.as_ref());
    if let Some(at) = &view.certificate_expires_at {
        sheet.line(
            "certificate",
            format!("ends {} ({at}), renews itself", time_until(Some(at))),
        );
    }
    sheet
        .some(
            "agent's CA",
            view.authority_fingerprint
                .as_ref()
                .map(|fingerprint| format!("sha256:{}", printable(fingerprint))),
        )
        .line("current", if view.current { "yes" } else { "no" });
    sheet.render(paint)
}
