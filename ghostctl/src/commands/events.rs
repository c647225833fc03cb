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
        })
        .await
        .map_err(failed)?
        .into_inner();
    let mut any = false;
    let mut last: Option<u64> = None;
    while let Some(event) = stream.message().await.map_err(failed)? {
        let event = Event::from(event);
        any = true;
        // A number below the last one is a new run of the agent, and no gap.
        if let Some(last) = last
            && event.sequence > last.saturating_add(1)
            && unfiltered
        {
            let missed = usize::try_from(event.sequence - last - 1).unwrap_or(usize::MAX);
            let missed = count(missed, "event was", "events were");
            session.printer.warning(&format!("{missed} missed"));
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

fn line(event: &Event, paint: Paint) -> String {
    let subject = event.subject.as_deref().unwrap_or("-");
    format!(
        "{}  {}  {:16}  {}: {}\n",
        event.at,
        paint.state(
            &event.severity,
            &format!("{:7}", printable(&event.severity))
        ),
        printable(&event.kind),
        printable(subject),
        printable(&event.message),
    )
}
