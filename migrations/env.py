"""Runs migrations on the connection that rococap passes in, or else on the database that ROCOCAP_DB names."""

from alembic import context

from rococap import db
from rococap.tables import metadata


def run(connection):
    context.configure(
        connection=connection,
        target_metadata=metadata,
        render_as_batch=True,
        # The whole migration is one transaction, which rococap.db begins and commits.
        transactional_ddl=False,
    )
    context.run_migrations()


if (passed_in := context.config.attributes.get("connection")) is not None:
    run(passed_in)
else:
    with db.migration_connection(db.connect(db.default_url(), create=False)) as connection:
        run(connection)
