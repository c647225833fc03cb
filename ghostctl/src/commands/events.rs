//! `events`: one line an event, as they come.

use ghost_proto::agent::v1::WatchEventsRequest;
use ghost_proto::view::Event;

use crate::arguments::EventsArgs;
use crate::connect::Session;
use crate::errors::{Exit, Failure};
use crate::table::Paint;
use crate::text::{count, printable};

pub(super) async fn run(args: EventsArgs, session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    // The numbers of one VM's events have gaps by nature.
    let unfiltered = args.vm.is_none();
    let failed = |status| agent.failure(&status);
    let mut stream = agent
        .events()
        .watch(WatchEventsRequest {
            vm: args.vm.unwrap_or_default(),
            replay: !args.new,
            follow: args.follow || args.new,
            ..WatchEventsRequest::default()
        })
        .await
        .map_err(failed)?
        .into_inner();
    let mut any = false;
    let mut last: Option<u64> = None;
    while let Some(event) = stream.message().await.map_err(failed)? {
        let event = Event::from(event);
        any = true;
        let lost = missed(&event, last.filter(|_| unfiltered));
        if lost > 0 {
            let lost = usize::try_from(lost).unwrap_or(usize::MAX);
            let lost = count(lost, "event was", "events were");
            session.printer.warning(&format!("{lost} missed"));
        }
        last = Some(event.sequence);
        let number = event.sequence.to_string();
        session
            .printer
            .item(&event, &number, |paint| line(&event, paint))?;
    }
    if !any && !args.follow && !args.new {
        session.printer.note("nothing has happened yet");
    }
    Ok(Exit::Done)
}

/// How many events between `last` and this one were not told. Core says so itself; at an agent the
/// gap does, where a number below the last one is a new run, and no gap.
fn missed(event: &Event, last: Option<u64>) -> u64 {
    match last {
        _ if event.host_id.is_some() => event.missed,
        Some(last) => event.sequence.saturating_sub(last.saturating_add(1)),
        None => 0,
    }
}

fn line(event: &Event, paint: Paint) -> String {
    let subject = event.subject.as_deref().unwrap_or("-");
    let subject = match event.host.as_deref() {
        Some(host) if host != subject => format!("{host}/{subject}"),
        _ => subject.to_owned(),
    };
    format!(
        "{}  {}  {:16}  {}: {}\n",
        event.at,
        paint.state(
            &event.severity,
            &format!("{:7}", printable(&event.severity))
        ),
        printable(&event.kind),
        printable(&subject),
        printable(&event.message),
    )
}

#[cfg(test)]
mod tests {
    use ghost_proto::agent::v1::Event as Message;

    use super::*;

    fn of_fleet(subject: &str) -> Event {
        Event::from(Message {
            sequence: 9,
            kind: "vm_state".into(),
            severity: "info".into(),
            subject: subject.into(),
            message: "starting -> running".into(),
            host: "pc".into(),
            host_id: "8d7f0000-0000-4000-8000-000000000001".into(),
            missed: 4,
            ..Message::default()
        })
    }

    #[test]
    fn an_event_of_a_fleet_names_its_host() {
        let shown = |event| line(&event, Paint::new(false));
        assert!(shown(of_fleet("web")).contains(" pc/web: starting"));
        // Of the host itself once is enough.
        assert!(shown(of_fleet("pc")).contains(" pc: starting"));
    }

    #[test]
    fn core_says_what_was_missed_and_an_agent_by_a_gap() {
        assert_eq!(missed(&of_fleet("web"), Some(2)), 4);
        let own = |sequence| {
            Event::from(Message {
                sequence,
                ..Message::default()
            })
        };
        assert_eq!(missed(&own(4), Some(2)), 1);
        for last in [None, Some(3), Some(1000)] {
            assert_eq!(missed(&own(4), last), 0, "{last:?}");
        }
    }
}
